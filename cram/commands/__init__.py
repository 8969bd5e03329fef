"""The subcommands of `cram`, a module each."""
