"""Small faults put into the sources on purpose, to see which of them the tests notice."""
