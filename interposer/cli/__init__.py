"""The commands `sanrun` and `sanctl`."""
