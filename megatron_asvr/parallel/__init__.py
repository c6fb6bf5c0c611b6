"""How ranks are arranged and talk to one another; the only user of megatron-core's globals."""
