"""The backends. `contract` says what a backend is, and lists them. No backend imports another."""
