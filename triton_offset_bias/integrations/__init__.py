"""Models of other libraries on this package's attention. The package itself imports nothing from here."""
