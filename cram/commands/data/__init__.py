"""The subcommands about data alone."""
