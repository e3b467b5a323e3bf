"""What the page shows, a file for each tab and box."""
