"""Networks that papers brought, and the methods that came with them."""
