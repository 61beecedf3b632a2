"""IPT on the engine: what each batch is, what learns from it, and what a run leaves behind."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pretrain.data.loader import TrainSet
from pretrain.data.sources import training_records
from pretrain.methods.ipt.loss import patch_contrast
from pretrain.methods.ipt.method import Restoration
from pretrain.methods.ipt.network import IPT, Sizes
from pretrain.methods.ipt.origin import PREFIX
from pretrain.methods.ipt.samples import parts
from pretrain.methods.ipt.tasks import SIX_TASKS
from pretrain.trainer import PretrainTrainer
from tests.ipt.tiny import tiny_config, train_here
from tests.methods.test_methods import as_if_stopped, final, metrics, tensors
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Smooth images; some smaller than the 48 pixels of x4, five to validate on."""
    folder = tmp_path_factory.mktemp("restored")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        (folder / split).mkdir()
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
            size = (40, 30) if i == 2 else (70, 60)
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / split / f"{i}.png")
    return folder


def method_of(cfg) -> Restoration:
    torch.manual_seed(0)
    return Restoration(cfg, 0).train()


def train_set(cfg) -> TrainSet:
    return TrainSet(training_records(cfg), Restoration.build_samples(cfg, None, []), cfg.SEED)


def batch_of(cfg, iteration: int) -> dict:
    train, size = train_set(cfg), cfg.SOLVER.IMS_PER_BATCH
    samples = [train[iteration * size + place] for place in range(size)]
    return {**train.samples.collate(samples), "iteration": iteration}


def iteration_of(method: Restoration, name: str) -> int:
    """The first one with this task."""
    names = [task.name for task in method.tasks]
    return next(i for i in range(200) if names[method.task_at(i)] == name)


# --- data


def test_crops_are_pixels_of_the_image_and_parts_of_them_lie_anywhere(images, tmp_path):
    cfg = tiny_config(tmp_path / "run", images)
    train = train_set(cfg)
    first = set()
    for position in range(64):
        sample = train[position]
        whole = np.asarray(Image.open(images / "train" / sample["image_id"])).astype(np.int16)
        assert sample["image"].shape == (3, 48, 48)
        if min(whole.shape[:2]) < 48:
            continue  # enlarged
        part = parts(sample["image"][None], sample["place"][None], 12)[0].permute(1, 2, 0)
        windows = np.lib.stride_tricks.sliding_window_view(whole, (12, 12), axis=(0, 1))
        same = (windows == part.permute(2, 0, 1).numpy()).all((2, 3, 4))
        y, x = np.argwhere(same)[0]
        room = np.array(whole.shape[:2]) - 12
        first.add((y, x))
        assert np.abs(np.array((y, x)) - sample["place"].numpy() * room).max() < 2
    assert min(y for y, _ in first) < 5
    assert max(x for _, x in first) > 52


def test_an_iteration_has_one_task_and_what_is_random_does_not_depend_on_the_batch(
    images,
    tmp_path,
):
    cfg = tiny_config(tmp_path / "run", images)
    method = method_of(cfg)
    tasks = [method.task_at(i) for i in range(600)]
    assert np.bincount(tasks, minlength=6).min() > 70, "each as likely"
    for name in SIX_TASKS:
        iteration = iteration_of(method, name)
        batch = batch_of(cfg, iteration)
        (number,) = method.prepare(batch)["pairs"]
        assert SIX_TASKS[number] == name
        samples = train_set(cfg)
        four = [samples[4 * iteration + place] for place in (1, 3)]
        half = {**samples.samples.collate(four), "iteration": iteration}
        whole, part = (method.prepare(given)["pairs"][number] for given in (batch, half))
        for one, other in zip(whole, part):
            torch.testing.assert_close(one[1::2], other, rtol=0, atol=1e-3)


def test_turned_crops_are_turned_images(images, tmp_path):
    straight = train_set(tiny_config(tmp_path / "run", images))
    turned = train_set(tiny_config(tmp_path / "run", images, "IPT.FLIPS", "True"))
    ways = set()
    for position in range(60):
        one, other = (of[position]["image"] for of in (straight, turned))
        all_ways = [x for k in range(4) for x in [one.rot90(k, (1, 2))]]
        all_ways += [x.flip(2) for x in all_ways]
        ways |= {n for n, x in enumerate(all_ways) if torch.equal(x, other)}
    assert ways == set(range(8))


def test_streaks_of_a_folder_are_those_that_fall(images, tmp_path):
    folder = tmp_path / "streaks"
    folder.mkdir()
    layer = np.zeros((14, 13), np.uint8)
    layer[:, ::5] = 60
    Image.fromarray(layer).save(folder / "rainstreak-1.png")
    cfg = tiny_config(tmp_path / "run", images, "IPT.RAIN_STREAKS", str(folder))
    method = method_of(cfg)
    batch = batch_of(cfg, iteration_of(method, "derain"))
    (pair,) = method.prepare(batch)["pairs"].values()
    rain = (pair.degraded - pair.clean).clamp(min=0)
    assert batch["streaks"].shape == (4, 1, 12, 12)
    expected = (pair.clean + batch["streaks"]).clamp(max=255) - pair.clean
    assert torch.equal(rain, expected)
    Image.fromarray(np.zeros((11, 40), np.uint8)).save(folder / "small.png")
    with pytest.raises(InputError, match=r"small.png: is 40x11 pixels, less than .*PATCH_SIZE 12"):
        Restoration.build_samples(cfg, None, [])
    Image.fromarray(np.eye(12, dtype=np.uint8)[..., None] * np.uint8([9, 8, 9])).save(
        folder / "small.png"
    )
    with pytest.raises(InputError, match=r"small.png: is coloured; expected the gray layer"):
        Restoration.build_samples(cfg, None, [])


# --- losses and gradients


@pytest.mark.parametrize("at_a_time", [1, 40, 10**6])
def test_the_contrast_is_that_of_its_definition_in_any_number_of_parts(monkeypatch, at_a_time):
    monkeypatch.setattr("pretrain.methods.ipt.loss._AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    tokens = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows = F.normalize(tokens, dim=2).flatten(0, 1)
    similar = rows @ rows.T / 0.3
    total = 0
    for anchor in range(12):
        others = [other for other in range(12) if other != anchor]
        mine = [other for other in others if other // 4 == anchor // 4]
        sums = torch.logsumexp(similar[anchor, others], 0)
        total = total + torch.stack([sums - similar[anchor, one] for one in mine]).mean() / 12
    found = patch_contrast(tokens, 0.3)
    torch.testing.assert_close(found, total)
    expected = torch.autograd.grad(total, tokens)[0]
    torch.testing.assert_close(torch.autograd.grad(found, tokens)[0], expected)
    moved = patch_contrast(tokens.detach()[[1, 2, 0]], 0.3)
    torch.testing.assert_close(moved, found.detach())


def test_l1_alone_reaches_the_whole_body_and_the_tasks_row_with_the_contrast_on(
    images,
    tmp_path,
):
    cfg = tiny_config(tmp_path / "run", images)
    method = method_of(cfg)
    for name in SIX_TASKS:
        batch = batch_of(cfg, iteration_of(method, name))
        method.zero_grad(set_to_none=True)
        losses = method(method.prepare(batch))
        assert losses.keys() == {"loss_l1", "loss_contrast"}
        losses["loss_l1"].backward()
        number = SIX_TASKS.index(name)
        for parameter, grad in ((p, x.grad) for p, x in method.named_parameters()):
            part, _, rest = parameter.removeprefix(PREFIX).partition(".")
            if part in ("head", "tail") and not rest.startswith(f"{number}."):
                assert grad is None, parameter
            elif rest == "query_embed.weight":
                assert (grad.abs().sum(1) > 0).tolist() == [n == number for n in range(6)]
            else:
                assert grad.abs().sum() > 0, parameter


def test_the_contrast_reaches_the_heads_and_falls_when_it_is_trained_alone(images, tmp_path):
    more = "IPT.TASKS", "['noise30']", "IPT.CONTRAST_WEIGHT", "1.0"
    cfg = tiny_config(tmp_path / "run", images, *more)
    method = method_of(cfg)
    optimizer = torch.optim.Adam(method.parameters(), 2e-3)
    batch = method.prepare(batch_of(cfg, 0))
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = method(batch)["loss_contrast"]
        loss.backward()
        values.append(loss.item())
        assert method.network.head[0][0].weight.grad.abs().sum() > 0
        optimizer.step()
    assert values[-1] < values[0] - 0.2


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_through_all_six_tasks(
    images,
    tmp_path,
    run_python,
):
    tiny_config(tmp_path / "run", images)
    done = run_python("tests/ipt/two_processes.py", tmp_path, tmp_path / "run.yaml", cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_of_two_processes_has_the_losses_of_one(images, tmp_path, run_python):
    more = ["SOLVER.MAX_ITER", "16", "IPT.CONTRAST_WEIGHT", "0.0", "TEST.EVAL_PERIOD", "0"]
    train_here(tmp_path / "one", images, *more)
    tiny_config(tmp_path / "two", images)
    flags = ["--config-file", tmp_path / "two.yaml", "--num-processes", "2"]
    output = ["OUTPUT_DIR", tmp_path / "two", *more]
    done = run_python("tools/pretrain_net.py", *flags, *output, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["loss_l1"] for line in two] == pytest.approx(
        [line["loss_l1"] for line in one], rel=1e-3
    )
    method = method_of(tiny_config(tmp_path / "two", images))
    assert {method.task_at(iteration) for iteration in range(16)} == set(range(6))
    assert two[-1]["val/psnr"] == pytest.approx(one[-1]["val/psnr"], abs=0.05)


# --- runs


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """A whole run of six iterations."""
    folder = tmp_path_factory.mktemp("ipt") / "whole"
    train_here(folder, images)
    return folder


def test_a_run_resumes_to_the_bit(images, run, tmp_path):
    train_here(as_if_stopped(run, tmp_path / "resumed"), images)
    one, other = tensors(final(run)), tensors(final(tmp_path / "resumed"))
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_run_validates_every_task_and_exports_released_names(images, run):
    last = metrics(run)[-1]
    each = [last[f"val/psnr_{name}"] for name in SIX_TASKS]
    assert last["val/psnr"] == pytest.approx(sum(each) / 6)
    assert last["val/input_psnr_noise50"] < last["val/input_psnr_noise30"] < 30
    state, metadata = read_safetensors(run / "restorer.safetensors")
    expected = IPT(Sizes((2, 3, 4, 1, 1, 1), 4, 12, 1, 2)).state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
    assert state["body.position_encoding.position_ids"].dtype == torch.int64
    trained = final(run)["model"]
    assert all(torch.equal(trained[PREFIX + name], tensor) for name, tensor in state.items())
    assert metadata["tasks"] == "x2,x3,x4,derain,noise30,noise50"
    assert (metadata["heads"], metadata["positions"]) == ("2", "once")
    assert not (run / "backbone.safetensors").exists()


def test_validation_is_what_the_network_does_to_the_centre_of_each_image(images, tmp_path):
    cfg = tiny_config(tmp_path / "run", images, "IPT.TASKS", "['x2','noise30']")
    trainer = PretrainTrainer(cfg)
    found = trainer.evaluate()
    method, val = trainer.method.eval(), trainer.data.val
    errors = []
    for index in range(5):
        (sample,) = val.of_image(index)[0]
        clean = sample["image"][None, :, 6:18, 6:18].float()  # of 24 pixels
        noise = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(int(sample["seed"])))
        noisy = (clean + 30 * noise).clamp(0, 255)
        with torch.no_grad():
            errors.append((method.network(noisy, 1) - clean).abs().mean())
        image = Image.open(images / "val" / sample["image_id"])
        if min(image.size) >= 24:
            x, y = (image.width - 24) // 2, (image.height - 24) // 2
            centre = np.asarray(image.crop((x, y, x + 24, y + 24)))
            assert np.array_equal(sample["image"].permute(1, 2, 0), centre)
    with_x2 = 2 * found["loss_l1"] - torch.stack(errors).mean().item()
    assert 0 < with_x2 < 255
    pictures = dict(method.pictures(val, 3))
    assert list(pictures) == [f"restored/{n}.png" for n in range(3)]
    picture = pictures["restored/0.png"]
    assert picture.shape == (3, 2 * 24, 3 * 24)
    truth = val.of_image(0)[0][0]["image"].numpy()
    assert np.array_equal(picture[:, :24, 48:], truth), "x2: the whole crop"
    assert method.training is False


def names_of(run: Path) -> str:
    return str(run / "model_final.pth")


def test_one_task_is_tuned_from_a_checkpoint_of_six(images, run, tmp_path):
    for weights in ("model_final.pth", "restorer.safetensors"):
        more = "IPT.TASKS", "['noise50']", "MODEL.WEIGHTS", str(run / weights)
        trainer = PretrainTrainer(tiny_config(tmp_path / "run", images, *more))
        trainer.load_weights()
        six, one = final(run)["model"], trainer.method.state_dict()
        for name, tensor in one.items():
            if name.endswith("query_embed.weight"):
                assert torch.equal(tensor, six[name][5:])
            else:
                theirs = re.sub(r"^network\.(head|tail)\.0", r"network.\1.5", name)
                assert torch.equal(tensor, six[theirs]), name
        before = trainer.evaluate()
        trainer.resume_or_load(resume=False)
        trainer.train()
        assert before["psnr_noise50"] == pytest.approx(metrics(run)[-1]["val/psnr_noise50"], abs=1)
        shutil.rmtree(tmp_path / "run")


def test_a_new_task_starts_anew_beside_the_others(images, run, tmp_path):
    more = ["IPT.TASKS", "['noise70', 'x3']", "MODEL.WEIGHTS", str(run / "restorer.safetensors")]
    with pytest.raises(InputError, match="has no task noise70, but x2, x3, .*IPT.NEW_TASKS"):
        PretrainTrainer(tiny_config(tmp_path / "run", images, *more)).load_weights()
    more += ["IPT.NEW_TASKS", "['noise70']"]
    trainer = PretrainTrainer(tiny_config(tmp_path / "run", images, *more))
    fresh = {name: tensor.clone() for name, tensor in trainer.method.state_dict().items()}
    trainer.load_weights()
    six, found = final(run)["model"], trainer.method.state_dict()
    row = PREFIX + "body.query_embed.weight"
    assert torch.equal(found[row][0], fresh[row][0])
    assert torch.equal(found[row][1], six[row][1])
    for part in ("head.{}.0.weight", "tail.{}.1.weight"):
        name = PREFIX + part
        assert torch.equal(found[name.format(0)], fresh[name.format(0)])
        assert torch.equal(found[name.format(1)], six[name.format(1)])
    body = PREFIX + "body.linear_encoding.weight"
    assert torch.equal(found[body], six[body])
    with pytest.raises(InputError, match="has no task noise70"):
        trainer.load_for_evaluation()


def test_a_new_task_may_begin_as_another_and_be_evaluated_by_it(images, run, tmp_path):
    more = ["IPT.TASKS", "['noise70']", "MODEL.WEIGHTS", str(run / "restorer.safetensors")]
    more += ["IPT.NEW_TASKS", "['noise70:noise50']"]
    trainer = PretrainTrainer(tiny_config(tmp_path / "run", images, *more))
    for load in (trainer.load_weights, trainer.load_for_evaluation):
        load()
        six, found = final(run)["model"], trainer.method.state_dict()
        for name in ("head.{}.0.weight", "tail.{}.1.bias"):
            assert torch.equal(found[PREFIX + name.format(0)], six[PREFIX + name.format(5)])
        row = PREFIX + "body.query_embed.weight"
        assert torch.equal(found[row], six[row][5:])
    trainer.resume_or_load(resume=False)
    trainer.train()
    more[3] = names_of(tmp_path / "run")  # has the task itself
    again = PretrainTrainer(tiny_config(tmp_path / "again", images, *more))
    again.load_for_evaluation()
    assert torch.equal(again.method.state_dict()[row], final(tmp_path / "run")["model"][row])


def test_a_released_file_is_a_start_too(images, tmp_path):
    """It says nothing of its tasks: six are the released ones, one is the task of the config."""
    torch.manual_seed(3)
    six = IPT(Sizes((2, 3, 4, 1, 1, 1), 4, 12, 1, 2)).state_dict()
    torch.save(six, tmp_path / "IPT_pretrain.pt")
    one = IPT(Sizes((1,), 4, 12, 1, 2)).state_dict()
    torch.save(one, tmp_path / "IPT_denoise50.pt")
    for file, task, there in (("IPT_pretrain", "derain", 3), ("IPT_denoise50", "noise50", 0)):
        more = "IPT.TASKS", f"['{task}']", "MODEL.WEIGHTS", str(tmp_path / f"{file}.pt")
        trainer = PretrainTrainer(tiny_config(tmp_path / "run", images, *more))
        trainer.load_weights()
        state = six if there else one
        loaded = trainer.method.network.state_dict()
        assert torch.equal(loaded["head.0.0.weight"], state[f"head.{there}.0.weight"])
        assert torch.equal(
            loaded["body.query_embed.weight"][0], state["body.query_embed.weight"][there]
        )


@pytest.mark.slow
def test_noise_is_learned_to_be_taken_away(images, tmp_path):
    more = ["IPT.TASKS", "['noise50', 'noise30']", "IPT.FEATURES", "8", "SOLVER.MAX_ITER", "300"]
    more += ["SOLVER.IMS_PER_BATCH", "8", "TEST.EVAL_PERIOD", "0", "SOLVER.BASE_LR", "0.004"]
    trainer = train_here(tmp_path / "run", images, *more, "SOLVER.CHECKPOINT_PERIOD", "300")
    found = trainer.evaluate()
    assert found["psnr_noise50"] > found["input_psnr_noise50"] + 3
    assert found["psnr_noise30"] > found["input_psnr_noise30"] + 3


# --- bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["IPT.LAYERS", "2"], "other sizes: it has IPT.LAYERS 1, not 2. Nothing was loaded"),
        (["IPT.HEADS", "4"], "IPT.HEADS 2, not 4"),
        (["IPT.FEATURES", "8"], "IPT.FEATURES 4, not 8"),
        (["IPT.PATCH_SIZE", "24"], "IPT.PATCH_SIZE 12, not 24"),
        (["IPT.POSITIONS", "every"], "IPT.POSITIONS once, not every"),
        (["IPT.POSITIONS", "none"], "IPT.POSITIONS once, not none"),
        (["IPT.MLP", "False"], "IPT.MLP True, not False"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_refused_by_key(images, run, tmp_path, more, message):
    cfg = tiny_config(tmp_path / "run", images, "MODEL.WEIGHTS", names_of(run), *more)
    with pytest.raises(InputError, match=f"MODEL.WEIGHTS .*model_final.pth: .*{message}"):
        PretrainTrainer(cfg).load_weights()


@pytest.mark.parametrize(
    ("scales", "tasks", "message"),
    [
        ((2,), "['x4']", "its task 0 enlarges by 2, x4 by 4. Nothing was loaded"),
        ((2, 4), "['x4']", "does not say what its 2 tasks are, and IPT.TASKS looks for 1 there"),
    ],
)
def test_a_released_file_of_another_scale_is_refused(images, tmp_path, scales, tasks, message):
    torch.save(IPT(Sizes(scales, 4, 12, 1, 2)).state_dict(), tmp_path / "IPT_sr.pt")
    more = "IPT.TASKS", tasks, "MODEL.WEIGHTS", str(tmp_path / "IPT_sr.pt")
    with pytest.raises(InputError, match=message):
        PretrainTrainer(tiny_config(tmp_path / "run", images, *more)).load_weights()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["IPT.TASKS", "['x5']"], "IPT.TASKS: 'x5' is no task: expected x2, x3, x4, derain, or"),
        (["IPT.TASKS", "[2]"], "IPT.TASKS: '2' is no task"),
        (["IPT.TASKS", "[]"], r"IPT.TASKS \[\]: expected one task or several"),
        (["IPT.TASKS", "['x2', 'x2']"], "expected one task or several different ones"),
        (["IPT.NEW_TASKS", "['noise70']"], "IPT.NEW_TASKS: 'noise70' is not among IPT.TASKS"),
        (["IPT.NEW_TASKS", "['x4:noise50']"], "x4:noise50: noise50 does not enlarge as x4 does"),
        (["IPT.NEW_TASKS", "['x4:x5']"], "IPT.NEW_TASKS: 'x5' is no task"),
        (["IPT.NEW_TASKS", "['x4', 'x4']"], "names a task twice"),
        (["IPT.PATCH_SIZE", "20"], "a patch of 20 pixels is no multiple of 3"),
        (["IPT.HEADS", "5"], "36 channels of a token do not divide into 5 heads"),
        (["IPT.CONTRAST_WEIGHT", "-0.1"], "must not be negative"),
        (["IPT.TEMPERATURE", "0.0"], "must be positive"),
        (["SOLVER.IMS_PER_BATCH", "1"], "is one image for each of 1 processes, whose patches"),
        (["DATA.IMAGE_SIZE", "48"], "DATA.IMAGE_SIZE 48: MODEL.OBJECTIVE ipt has no use for it"),
        (["DATA.FLIP_PROB", "0.0"], "DATA.FLIP_PROB 0.0: .*IPT.FLIPS turns them"),
        (["TEST.BEST_METRIC", "val/psnr_x5"], "'val/psnr_x5' is none of .*val/psnr_x2"),
    ],
)
def test_a_config_that_cannot_be_is_refused(images, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        PretrainTrainer(tiny_config(tmp_path / "run", images, *more))
