"""What lies between a request and the replies: who may ask, what is logged and counted."""
