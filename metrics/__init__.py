"""Image measures. Pure torch and numpy; nothing here downloads weights."""
