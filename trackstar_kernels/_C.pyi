def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def project_gradients(
    batch: int,
    in_features: int,
    out_features: int,
    rank: int,
    q: int,
    p: int,
    activations: int,
    output_grads: int,
    offsets: int,
    left: int,
    right: int,
    scale: int,
    out: int,
    threads: int,
) -> None: ...
def score_topk(
    queries: int,
    rows: int,
    row_type: str,
    row_stride: int,
    scales: int,
    Q: int,
    N: int,
    L: int,
    d: int,
    k: int,
    largest: bool,
    threads: int,
    scores: int,
    positions: int,
) -> None: ...
