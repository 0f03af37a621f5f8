import itertools
from dataclasses import replace

import pytest
import torch

from limbeck.errors import UserError
from limbeck.models import build, load, save
from limbeck.models.beam import beam_search
from limbeck.models.sentences import BEGIN, END, PAD, Sentences, sources, targets
from limbeck.models.seq2seq import AttentionLSTM, Seq2Seq, Transformer

TEXT = Sentences.trained(
    ["a man rides", "two men"], ["ein Mann fährt", "zwei Männer"], 300, longest=9
)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


NETWORKS = [
    pytest.param(lambda: AttentionLSTM(2, 12, 20, 6, 0.3), id="lstm"),
    pytest.param(lambda: Transformer(2, 16, 20, 6), id="transformer"),
]


def count(layers, width, source, target):
    with torch.device("meta"):
        return sum(p.numel() for p in AttentionLSTM(layers, width, source, target).parameters())


@pytest.mark.parametrize(
    ("layers", "width", "vocabulary", "millions"),
    [(4, 1000, 50_000, 221), (2, 500, 50_000, 84), (2, 300, 50_000, 49), (2, 100, 25_000, 8)],
)
def test_lstms_have_the_published_sizes(layers, width, vocabulary, millions):
    found = count(layers, width, vocabulary, vocabulary)
    assert abs(found / 1e6 - millions) < 1.0
    # Embeddings and output; encoder; decoder, whose first layer is fed twice the width; attention.
    lstm = [4 * (width * width + width * width + 2 * width)] * (2 * layers)
    expected = 3 * vocabulary * width + vocabulary + sum(lstm) + 4 * width * width
    assert found == expected + 3 * width * width


@pytest.mark.parametrize("make", NETWORKS)
def test_filling_changes_nothing(make):
    net = seeded(make)
    short, long = [5, 6, 7], [8, 9, 10, 11, 12]
    before, _ = targets([[3, 4], [5, 3, 4, 5]])
    with torch.no_grad():
        both = net((sources([short, long]), before))
        alone = net((sources([short]), before[:1, :3]))
    assert torch.allclose(both[:1, :3], alone, atol=1e-5)


@pytest.mark.parametrize("make", NETWORKS)
def test_a_token_hears_of_none_behind_it(make):
    net = seeded(make)
    source, (before, _) = sources([[5, 6, 7]]), targets([[3, 4, 5]])
    other = before.clone()
    other[0, 3] = 4
    with torch.no_grad():
        assert torch.equal(net((source, before))[:, :3], net((source, other))[:, :3])


@pytest.mark.parametrize("make", NETWORKS)
def test_step_by_step_it_says_what_it_says_at_once(make):
    net = seeded(make)
    source, (before, _) = sources([[5, 6], [7, 8, 9]]), targets([[3, 4, 5], [4, 4, 3]])
    with torch.no_grad():
        expected = net((source, before))
        read, state = net.encode(source)
        for place in range(before.shape[1]):
            logits, state = net.step(before[:, place], read, state)
            assert torch.allclose(logits, expected[:, place], atol=1e-5)


def exhaustive(net, source, longest):
    """All sentences of up to so many tokens out of 3, 4 and 5, by their log-probabilities."""
    found = []
    for length in range(longest + 1):
        for words in itertools.product((3, 4, 5), repeat=length):
            before, label = targets([list(words)])
            logs = net((source, before)).log_softmax(-1)
            found.append((float(logs.gather(2, label[..., None]).sum()), list(words)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_a_beam_as_wide_as_there_are_sentences_finds_them_all_in_order(make):
    for seed in range(3):
        net = seeded(make, seed)
        source = sources([[5, 6, 7], [8, 9], [6]])
        found = beam_search(net, source, beam=121, longest=3, every=True)
        for row in range(3):
            expected = exhaustive(net, source[row : row + 1], 3)
            there = [
                (float(score), [t for t in tokens.tolist() if t not in (PAD, END)])
                for score, tokens, done in zip(
                    found.scores[row], found.tokens[row], found.finished[row], strict=True
                )
                if done
            ]
            assert len(there) == 1 + 3 + 9 + 27
            assert [words for _, words in there] == [words for _, words in expected]
            assert [s for s, _ in there] == pytest.approx([s for s, _ in expected], abs=1e-4)


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_a_beam_of_one_takes_the_most_probable_token_each_time(make):
    net = seeded(make, 4)
    source = sources([[5, 6, 7], [8, 9]])
    found = beam_search(net, source, beam=1, longest=6)
    for row in range(2):
        words, score = [BEGIN], 0.0
        while len(words) < 8 and words[-1] != END:
            logs = net((source[row : row + 1], torch.tensor([words])))[0, -1].log_softmax(-1)
            logs[[PAD, BEGIN]] = float("-inf")
            words.append(int(logs.argmax()))
            score += float(logs.max())
        assert found.tokens[row, 0].tolist()[: len(words) - 1] == words[1:]
        assert float(found.scores[row, 0]) == pytest.approx(score, abs=1e-4)


def test_the_first_hypothesis_is_the_same_whether_all_are_wanted_or_not():
    net = seeded(lambda: AttentionLSTM(1, 12, 20, 6), 1)
    source = sources([[n, n + 1] for n in range(3, 13)])
    one, every = (beam_search(net, source, 4, 8, every=e) for e in (False, True))
    assert torch.equal(one.scores[:, 0], every.scores[:, 0])
    assert (every.scores[:, :-1] >= every.scores[:, 1:]).all()


def test_a_hypothesis_that_found_no_end_is_not_finished():
    class Endless(Seq2Seq):
        def encode(self, source):
            return (), (torch.zeros(len(source), 1),)

        def step(self, token, read, state):
            logits = torch.zeros(len(token), 6)
            logits[:, END] = -50.0
            return logits, state

    found = beam_search(Endless(), torch.zeros(2, 1, dtype=torch.int64), 3, longest=4)
    assert found.tokens.shape == (2, 3, 5)
    assert not found.finished.any()


def test_dropout_sleeps_where_nothing_is_learnt():
    net = seeded(lambda: AttentionLSTM(2, 12, 20, 6, 0.3))
    view = sources([[5, 6]]), targets([[3]])[0]
    assert torch.equal(net(view), net(view))
    net.train()
    assert not torch.equal(net(view), net(view))


# Vocabularies.


def test_text_comes_back_as_it_was_whatever_it_is():
    whole = replace(TEXT, longest=50)
    for sentence in ("ein Mann, fährt!", "日本 🚲", "zwei", "Zwei"):
        assert whole.decode(whole.encode("target", [sentence])) == [sentence]
    (tokens,) = TEXT.encode("target", ["zwei zwei zwei zwei zwei zwei zwei zwei zwei zwei"])
    assert len(tokens) == TEXT.longest


def test_one_vocabulary_may_serve_both_sides():
    shared = Sentences.trained(["a man"], ["ein Mann"], 310, shared=True)
    assert shared.source == shared.target != TEXT.target


def test_vocabularies_are_the_same_whenever_they_are_learnt_from_the_same():
    lines = [f"{a} {b}" for a in ("man", "woman", "child") for b in ("rides", "runs", "reads")]
    assert len({Sentences.trained(lines, lines, 320) for _ in range(4)}) == 1


def test_a_network_is_stored_with_its_vocabulary(tmp_path):
    network = build("lstm-1x8", TEXT.vocabulary, TEXT, seed=1)
    save(network, tmp_path / "student", {})
    again = load(tmp_path / "student")
    assert again.input == TEXT
    assert again.classes == TEXT.vocabulary
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True)
    )
    card = (tmp_path / "student.json").read_text()
    (tmp_path / "student.json").write_text(card.replace("BPE", "EPB"))
    with pytest.raises(UserError, match="does not say what the model is fed"):
        load(tmp_path / "student")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lstm-1x0", "no network named 'lstm-1x0' that translates"),
        ("lstm-2", "no network named 'lstm-2' that translates"),
        ("resnet20", "no network named 'resnet20' that translates; known: lstm-1x64"),
        ("transformer-2x100", "parted into heads of 64"),
        ("timm:resnet18", "no model of timm can be fed sentences of 273 source"),
    ],
)
def test_what_is_no_translator_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, TEXT.vocabulary, TEXT)
