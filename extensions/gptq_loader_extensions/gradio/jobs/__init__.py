"""What the page does: load, download, measure, reply; no file here knows a component."""
