"""What the pages that commands write have in common: one file each, which loads nothing."""
