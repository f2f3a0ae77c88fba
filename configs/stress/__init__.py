"""Settings in which other codes fail: what a form has to bear."""
