"""The backends. `contract` says what one is and lists them; no backend imports another."""
