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
    element: str,
    activations: int,
    output_grads: int,
    offsets: int,
    left: int,
    right: int,
    scale: int,
    out: int,
    threads: int,
) -> None: ...
def pack_best_codes(blocks: int, d: int, unit: int, codes: int, threads: int) -> None: ...

class Rows:
    def __init__(self, values: int, type: str, stride: int, scales: int, N: int, L: int, d: int) -> None: ...

class TopK:
    def __init__(self, Q: int, k: int, largest: bool, scores: int, positions: int, reached: int) -> None: ...

class Found:
    def __init__(self, scores: int, positions: int, k: int) -> None: ...

class Queries:
    def __init__(self, values: int, Q: int, L: int, d: int, type: str) -> None: ...

class Task:
    def __init__(
        self, Q: int, L: int, d: int, rank: int, base: float, sign: float, trusted: float
    ) -> None: ...
    def set_block(self, b: int, factors: int, combine: int) -> None: ...
    def set_weights(self, weights: int) -> None: ...

def score_topk(queries: int, rows: Rows, tops: list[TopK], threads: int) -> None: ...
def score_queries(queries: Queries, rows: Rows, tops: list[TopK], threads: int) -> None: ...
def merge_topk(parts: list[Found], top: TopK) -> None: ...
def rescored_topk(
    queries: int, codes: Rows, wider: Rows, squared_norms: int, tops: list[TopK], rescored: int, threads: int
) -> None: ...
def mixed_topk(
    task: Task, squared_norms: int, rows: Rows, tops: list[TopK], doubtful: int, threads: int
) -> None: ...
def mixed_parts(task: Task, rows: Rows, numerators: int, squares: int, inner: int, threads: int) -> None: ...

# Whether there is what follows.
with_cuda: bool

class CudaRows:
    def __init__(self, values: int, type: str, stride: int, scales: int, N: int, L: int, d: int) -> None: ...

class CudaSurvivors:
    def __init__(self, keys: int, Q: int, k: int, slices: int, capacity: int, largest: bool) -> None: ...

def cuda_score_topk(
    rows: CudaRows,
    queries: int,
    operand: int,
    query_scales: int,
    columns: int,
    survivors: CudaSurvivors,
    stream: int,
) -> None: ...
def cuda_mixed_topk(
    rows: CudaRows,
    factors: int,
    combine: int,
    factor_scales: int,
    squared_norms: int,
    rank: int,
    base: float,
    sign: float,
    trusted: float,
    doubtful: int,
    columns: int,
    survivors: CudaSurvivors,
    stream: int,
) -> None: ...
