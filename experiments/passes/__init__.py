"""One evaluation of the model: fault-free, injected, and the checks before both."""
