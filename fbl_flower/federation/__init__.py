"""The only folder that knows Flower: messages, the server's loop, the clients' handlers, and the in-process engine."""
