//! Under a clock that jumps to the next timer whenever nobody has anything to do.

use super::*;
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(30);

fn machines(n_machines: usize) -> Vec<MachineId> {
    (0..n_machines).map(|_| MachineId::generate()).collect()
}

/// Wait for memory in a task; answers how long it took.
fn ask(
    host: &Arc<Admission>,
    machine: &MachineId,
    mem_mib: u32,
    wait: Duration,
) -> tokio::task::JoinHandle<(Result<Reservation, NotAdmitted>, Duration)> {
    let (host, machine, asked) = (Arc::clone(host), machine.clone(), Instant::now());
    tokio::spawn(async move {
        let reserved = host.reserve(&machine, mem_mib, &Patience::of(wait)).await;
        (reserved, asked.elapsed())
    })
}

async fn settle() {
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn who_comes_first_is_admitted_first_and_a_small_one_does_not_overtake() {
    let host = Admission::new(100);
    let ids = machines(4);
    let (first, _) = ask(&host, &ids[0], 60, WAIT).await.unwrap();
    let large = ask(&host, &ids[1], 80, WAIT);
    settle().await;
    let small = ask(&host, &ids[2], 10, WAIT);
    settle().await;
    assert!(host.is_waiting(&ids[1]) && host.is_waiting(&ids[2]));
    assert_eq!(host.shortfall_mib(), 40, "80 wanted, 40 free");
    assert!(!large.is_finished() && !small.is_finished());
    drop(first);
    let (large, waited) = large.await.unwrap();
    assert!(large.is_ok() && waited < WAIT);
    assert!(small.await.unwrap().0.is_ok(), "both fit now");
    assert!(!host.is_waiting(&ids[2]));
    assert_eq!(host.shortfall_mib(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_stays_full_refuses_at_the_deadline_and_the_next_in_line_goes_on() {
    let host = Admission::new(100);
    let ids = machines(3);
    let (held, _) = ask(&host, &ids[0], 70, WAIT).await.unwrap();
    let large = ask(&host, &ids[1], 50, WAIT);
    settle().await;
    let small = ask(&host, &ids[2], 30, WAIT * 10);
    let (refused, waited) = large.await.unwrap();
    assert_eq!(refused.err(), Some(NotAdmitted::Full { mem_mib: 50 }));
    assert_eq!(waited, WAIT);
    let (admitted, waited) = small.await.unwrap();
    assert!(admitted.is_ok());
    assert_eq!(
        waited, WAIT,
        "it fitted as soon as the one before it had given up"
    );
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn who_joins_a_wait_prolongs_it_and_never_shortens_it() {
    let host = Admission::new(100);
    let ids = machines(2);
    let held = host.take(100);
    let patience = Patience::of(WAIT);
    let wait = tokio::spawn({
        let (host, id, patience) = (Arc::clone(&host), ids[0].clone(), patience.clone());
        async move {
            let asked = Instant::now();
            (host.reserve(&id, 10, &patience).await.err(), asked.elapsed())
        }
    });
    tokio::time::sleep(WAIT / 2).await;
    patience.prolong(WAIT);
    patience.prolong(Duration::from_millis(1));
    let (refused, waited) = wait.await.unwrap();
    assert_eq!(refused, Some(NotAdmitted::Full { mem_mib: 10 }));
    assert_eq!(waited, WAIT / 2 + WAIT);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn what_can_never_be_had_is_refused_at_once() {
    let host = Admission::new(100);
    let (refused, waited) = ask(&host, &machines(1)[0], 101, WAIT).await.unwrap();
    let too_large = NotAdmitted::TooLarge {
        mem_mib: 101,
        budget_mib: 100,
    };
    assert_eq!(refused.err(), Some(too_large));
    assert_eq!(waited, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn whoever_stops_waiting_takes_nothing_along() {
    let host = Admission::new(100);
    let ids = machines(3);
    let held = host.take(100);
    let gone = ask(&host, &ids[0], 100, WAIT);
    settle().await;
    let next = ask(&host, &ids[1], 100, WAIT);
    settle().await;
    gone.abort();
    settle().await;
    drop(held);
    let (next, _) = next.await.unwrap();
    drop(next.unwrap());
    assert!(
        ask(&host, &ids[2], 100, WAIT).await.unwrap().0.is_ok(),
        "all of it is back"
    );
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_runs_already_takes_more_than_there_is() {
    let host = Admission::new(100);
    let ids = machines(1);
    let (first, second) = (host.take(80), host.take(80));
    let waiting = ask(&host, &ids[0], 50, WAIT);
    settle().await;
    drop(first);
    settle().await;
    assert!(!waiting.is_finished(), "80 of 100 are still taken");
    drop(second);
    assert!(waiting.await.unwrap().0.is_ok());
}

#[tokio::test(start_paused = true)]
async fn those_who_come_together_wait_together_and_give_back_what_none_of_them_called_for() {
    let host = Admission::new(100);
    let ids = machines(4);
    let held = host.take(50);
    let patience = Patience::of(WAIT);
    let together = tokio::spawn({
        let (host, ids, patience) = (Arc::clone(&host), ids[..3].to_vec(), patience.clone());
        async move { host.reserve_ahead(&ids, 30, &patience).await }
    });
    settle().await;
    assert!(!together.is_finished());
    assert_eq!(host.shortfall_mib(), 40, "90 wanted, 50 free");
    drop(held);
    let ahead = together.await.unwrap().unwrap();
    let (called_for, waited) = ask(&host, &ids[0], 30, WAIT).await.unwrap();
    assert_eq!(waited, Duration::ZERO);
    drop(ahead);
    let (rest, waited) = ask(&host, &ids[3], 70, WAIT).await.unwrap();
    assert!(rest.is_ok());
    assert_eq!(
        waited,
        Duration::ZERO,
        "the two that were not called for are back"
    );
    drop(called_for);
}
