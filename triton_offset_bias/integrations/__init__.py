"""Models of other libraries that run on this package's attention. The package itself imports nothing from here."""
