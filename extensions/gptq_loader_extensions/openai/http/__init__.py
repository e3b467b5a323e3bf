"""What lies between a request and its reply: who may send it, what is logged and counted."""
