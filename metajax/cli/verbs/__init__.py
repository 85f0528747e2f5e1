"""One module for each verb of the command line: its arguments and what it does, registered by the decorator `verb`."""
