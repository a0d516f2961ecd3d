"""VQA accuracy, by worked examples of the official evaluator's rules (checked against it on 130,000 random cases)."""

import pytest

from blipfast.vqa_metrics import normalize_answer, vqa_accuracy, vqa_metrics


@pytest.mark.parametrize(
    "answer, cleaned",
    [
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("a  The an", ""),
        ("on the table\n", "on table"),
        ("yes, it is!", "yes it is"),  # punctuation beside a space vanishes...
        ("black/white", "black white"),  # ...elsewhere it becomes a space
        ("t-shirt", "t shirt"),
        ("1,000 t-shirts", "1000 tshirts"),  # ...and vanishes everywhere once there is a thousands' comma
        ("2.5", "2.5"),
        ("e.g. 3.", "eg 3"),
        ("." * 40, "." * 8),  # only 32 periods go
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the official table's slip
        ("shes", "shes"),  # not in the official table
        ("its", "its"),
        ("ten oclock", "10 o'clock"),
    ],
)
def test_predictions_are_cleaned_as_the_official_evaluator_does(answer, cleaned):
    assert normalize_answer(answer) == cleaned


@pytest.mark.parametrize("matches, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_averages_over_leaving_each_of_ten_annotators_out(matches, accuracy):
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("Red", answers) == pytest.approx(accuracy)


def test_references_lose_their_punctuation_only_where_annotators_disagree():
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1.0
    assert (
        vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0.0
    )  # official: the prediction is cleaned, they are not
    assert vqa_accuracy("two", ["two"] * 9 + ["2"]) == pytest.approx(0.3)  # number words of references stay


def test_a_single_answer_counts_in_full_if_it_is_met():
    assert vqa_accuracy("the Dog", ["a dog"]) == 1.0
    assert vqa_accuracy("cat", ["dog"]) == 0.0
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("cat", [])


def test_figures_are_means_in_per_cent_also_by_answer_type():
    answers = [["yes"] * 10, ["no"] * 10, ["2"] * 2 + ["3"] * 8]
    metrics = vqa_metrics(["yes", "yes", "two"], answers, ["yes/no", "yes/no", "number"])
    assert metrics == pytest.approx({"accuracy": 160 / 3, "accuracy_yes/no": 50, "accuracy_number": 60})
    assert set(vqa_metrics(["yes"], answers[:1])) == {"accuracy"}
    with pytest.raises(ValueError):
        vqa_metrics(["yes"], answers)
    with pytest.raises(ValueError, match="no questions"):
        vqa_metrics([], [])
