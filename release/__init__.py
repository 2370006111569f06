"""What a release is made of: the locks of what Quire needs, and the list for machines of what is in them."""
