"""Head-to-head measurements against other libraries; each module is one command."""
