"""Jobs of the commands, one file each."""
