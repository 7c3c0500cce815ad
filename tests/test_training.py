"""Rows of a Hugging Face Trainer's own training run."""

import copy

import pytest
import torch
import transformers
from conftest import explicit_rows, make_examples, make_llama, relative_error
from trackstar import SketchSpec, TrainerRows

TOLERANCE = 2e-4


def trainer(model, examples, folder, callback, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = [example | {"labels": example["input_ids"]} for example in examples]
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_are_of_the_weights_of_their_step(tmp_path, accumulation):
    torch.manual_seed(0)
    model, examples = make_llama(), make_examples((8,) * 7)
    spec, weights = SketchSpec(sketch=4), []
    collected = TrainerRows(spec)

    class Weights(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            weights.append(copy.deepcopy(given["model"].state_dict()))

    run = trainer(model, examples, tmp_path, collected, gradient_accumulation_steps=accumulation)
    run.add_callback(Weights())
    run.train()
    assert sorted(collected.indices.tolist()) == list(range(7))
    assert collected.steps.tolist() == [i // (2 * accumulation) for i in range(7)]
    for step in range(len(weights)):
        model.load_state_dict(weights[step])
        chosen = collected.steps == step
        wanted = explicit_rows(model.eval(), [examples[i] for i in collected.indices[chosen]], spec)
        predictions = 7 * int(chosen.sum())
        assert relative_error(collected.rows[chosen], wanted / predictions) < TOLERANCE


def test_rows_may_go_elsewhere_and_training_is_what_it_was(tmp_path):
    torch.manual_seed(0)
    model, examples, given = make_llama(), make_examples((8,) * 4), []
    twin = copy.deepcopy(model)
    collected = TrainerRows(SketchSpec(sketch=4), on_rows=lambda *step: given.append(step))
    trainer(model, examples, tmp_path, collected, seed=3).train()
    trainer(twin, examples, tmp_path, transformers.TrainerCallback(), seed=3).train()
    assert [step for step, _, _ in given] == [0, 1]
    assert all(rows.shape == (2, 14, 16) and len(indices) == 2 for _, indices, rows in given)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_spec_that_does_not_fit_is_told_when_training_begins(tmp_path):
    run = trainer(
        make_llama(), make_examples((8,) * 2), tmp_path, TrainerRows(SketchSpec(modules=["nothing"]))
    )
    with pytest.raises(ValueError, match="pattern 'nothing' must match"):
        run.train()


def test_float16_training_is_refused():
    arguments = transformers.TrainingArguments(fp16=False, use_cpu=True, report_to=[])
    arguments.fp16 = True
    with pytest.raises(ValueError, match="training in float16 scales them: use bfloat16"):
        TrainerRows().on_train_begin(arguments, transformers.TrainerState(), None, model=make_llama())
