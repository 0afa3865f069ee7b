"""What this pack writes: files that are whole or not there, with their room looked at before, and unfinished runs."""
