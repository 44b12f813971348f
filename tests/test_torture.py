"""A few rounds of the torture of ``make torture``. Without it a pre-emption at the wrong moment would cost a user the run."""

from torture import start, torture


def test_a_run_that_is_struck_again_and_again_ends_as_if_left_in_peace(tmp_path, tiny_data):
    epochs, rounds = 20.0, 3
    peace = start(tmp_path, "undisturbed", data=tiny_data, epochs=epochs)
    status, output = peace.wait(seconds=300)
    assert status == 0, output
    struck, seed = 0, 20261121
    while struck < rounds:
        report = torture(tmp_path, data=tiny_data, rounds=rounds - struck, seed=seed, epochs=epochs)
        struck, seed = struck + sum(report.blows.values()), seed + 1
