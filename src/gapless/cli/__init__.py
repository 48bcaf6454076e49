"""The command line: `gapless generate`, `chat`, `bench`, `env`."""
