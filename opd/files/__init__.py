"""Files and folders on the disk: whole or not there, what of them is ours, and what a run directory holds."""
