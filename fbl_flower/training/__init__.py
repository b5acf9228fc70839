"""The only training loop, the only evaluation, and one client's round made of them."""
