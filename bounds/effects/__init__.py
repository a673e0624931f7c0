"""What a fault does to a layer, in closed form; what an unseen one can have done; its repair."""
