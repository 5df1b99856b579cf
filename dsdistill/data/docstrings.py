def table(split, cache):
    raise NotImplementedError
