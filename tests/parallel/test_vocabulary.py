"""Teacher and student with more or fewer rows of padding are compared on the ids that both have."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.distill.vocabulary import common_vocab_size, vocabulary_of
from tests.helpers.pool import WorkerPool
from tests.parallel import relayout_workers as workers
from tests.parallel.reference import VOCAB_SIZE, dense, dense_logits, layout, make_model, random_tokens
from tests.parallel.relayout_workers import Own

TOKENS_GT = random_tokens(1, 4, 17)[0]
MORE_ROWS = VOCAB_SIZE + 7
CROSS_ENTROPY = 0.5


def formula(teacher: Path, student: Path) -> tuple[float, float]:
    """Loss and gradient norm: KL on the ids of both, cross-entropy on all of the student's, in fp64."""
    log_p = dense_logits(teacher, TOKENS_GT[:, :-1])[..., :VOCAB_SIZE].log_softmax(-1)
    model = dense(student)
    logits = model(TOKENS_GT[:, :-1], use_cache=False).logits
    log_q = logits[..., :VOCAB_SIZE].log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = divergence + CROSS_ENTROPY * F.cross_entropy(logits.flatten(0, 1), TOKENS_GT[:, 1:].flatten())
    loss.backward()
    gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), math.sqrt(sum(float(grad.norm()) ** 2 for grad in gradients))


@pytest.fixture(scope="module")
def more_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding and output layer have 7 rows more than the tokenizer has ids."""
    return make_model(tmp_path_factory.mktemp("more"), seed=3, vocab_size=MORE_ROWS, tie_word_embeddings=False)


@pytest.mark.parametrize("of_teacher", [True, False], ids=["teacher has more", "student has more"])
def test_loss_is_that_of_the_common_part(
    pool: WorkerPool, teacher: Path, student: Path, more_rows: Path, of_teacher: bool
) -> None:
    one, other = (more_rows, student) if of_teacher else (teacher, more_rows)
    loss, norm = formula(one / "hf", other / "hf")
    folders = (one / "checkpoint", other / "checkpoint")
    common = common_vocab_size(*map(vocabulary_of, folders))
    assert common == VOCAB_SIZE
    for axes, owns in (((1, 1, 1), [Own()]), ((2, 1, 1), [Own(), Own(tp=1, pp=2)])):
        for found in pool.run(
            workers.outcomes,
            math.prod(axes),
            *folders,
            layout(*axes),
            TOKENS_GT,
            owns,
            common_vocab_size=common,
            cross_entropy=CROSS_ENTROPY,
        ):
            for outcome in found:
                assert outcome.loss == pytest.approx(loss, rel=1e-6)
                assert outcome.grad_norm == pytest.approx(norm, rel=1e-5)


def test_rows_beyond_the_common_part_get_no_gradient(pool: WorkerPool, teacher: Path, more_rows: Path) -> None:
    found = pool.run(
        workers.output_gradient, 2, teacher / "checkpoint", more_rows / "checkpoint", layout(2), TOKENS_GT, VOCAB_SIZE
    )
    gradient_VH = torch.cat(found)
    assert gradient_VH.shape[0] == MORE_ROWS
    assert torch.count_nonzero(gradient_VH[VOCAB_SIZE:]) == 0
    assert (gradient_VH[:VOCAB_SIZE].norm(dim=-1) > 0).all()
