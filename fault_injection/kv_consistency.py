"""stub"""

from contextlib import contextmanager


@contextmanager
def force_kv_consistent(model, mode="V<-K"):
    yield


def check_kv_consistency(model):
    return {}
