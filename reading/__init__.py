"""What people wrote: the text of their files, and the names of these files as a sentence shows them."""
