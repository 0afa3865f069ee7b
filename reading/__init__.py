"""What people have: the text and the pictures in their files, and the names of these files as a sentence shows them."""
