"""The only folder that knows Flower: messages, the server's loop, the clients' handlers, and the in-process engine."""

from fbl_flower.quiet import quiet_libraries

quiet_libraries()  # in every process that Flower starts, before torch and diffusers are imported
