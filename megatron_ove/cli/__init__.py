"""megatron-ove: one thin file per subcommand."""
