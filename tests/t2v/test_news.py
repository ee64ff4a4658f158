import time
from dataclasses import replace

import ray

from t2v.news import news
from tests.t2v.train_ranks import job


def test_ranks_hear_of_machines_that_go_and_again_when_it_is_time() -> None:
    train = job("", 2).train
    assert news(train, 2, [], None) == ""
    assert news(train, 2, [0, 1], None) == news(train, 2, [0, 1], time.time() + 100) == "ranks 0, 1 lose their machines"
    assert news(train, 2, [1], time.time() + 20) == "ranks 1 lose their machines soon"


def test_an_elastic_run_hears_of_room_for_more_ranks(ray_session: None) -> None:
    room = int(ray.cluster_resources()["CPU"])
    train = replace(job("", 1).train, workers=room + 1, gpus_per_worker=0, cpus_per_worker=1)
    assert news(train, room - 1, [], None) == ""
    elastic = replace(train, min_workers=1)
    assert news(elastic, room - 1, [], None) == f"the cluster has room for {room} ranks"
    assert news(elastic, room, [], None) == news(elastic, room + 1, [], None) == ""
