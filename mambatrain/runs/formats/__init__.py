"""Other tools' folders: one file per tool, with its names and its configuration as tables, read in both directions."""
