"""The command line: `gapless generate`, `chat`, `demo`, `bench`, `timeline`, `env`."""
