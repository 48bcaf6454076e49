"""What an engine did when: recorded while it runs, read back from a file, drawn as a picture."""
