"""Write a checkpoint in another format, to the bit where that format can hold it."""
