"""The command line and the demo; import them as `gensample.apps`."""
