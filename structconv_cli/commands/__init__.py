"""The commands: parse, call the library, show the result, choose the exit status."""
