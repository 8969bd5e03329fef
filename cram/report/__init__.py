"""Reports: their schema, tables, plots and the page."""
