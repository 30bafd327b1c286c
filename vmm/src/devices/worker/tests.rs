//! A pause waits for what is going on, and lets nothing begin.

use std::sync::atomic::AtomicUsize;

use nix::sys::epoll::EpollCreateFlags;

use super::*;

/// Takes its time in every turn, and ends it only in a pause.
struct Slow {
    n_begun: Arc<AtomicUsize>,
    n_ended: Arc<AtomicUsize>,
    event: EventFd,
}

impl Slow {
    fn turn(&self) {
        self.n_begun.fetch_add(1, Ordering::SeqCst);
        self.n_ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl Reactor for Slow {
    fn on_ready(&mut self, _token: u64, _flags: EpollFlags, pause: &AtomicBool) {
        silence(&self.event);
        self.n_begun.fetch_add(1, Ordering::SeqCst);
        while !pause.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        for _ in 0..10_000 {
            std::thread::yield_now();
        }
        self.n_ended.fetch_add(1, Ordering::SeqCst);
    }

    fn on_thaw(&mut self, _pause: &AtomicBool) {
        self.turn();
    }
}

#[test]
fn a_freeze_waits_for_the_turn_in_flight_and_a_thaw_looks_again() {
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::empty()).unwrap());
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    epoll
        .add(doorbell_fd(&event), EpollEvent::new(EpollFlags::EPOLLIN, 7))
        .unwrap();
    let (n_begun, n_ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let slow = Slow {
        n_begun: Arc::clone(&n_begun),
        n_ended: Arc::clone(&n_ended),
        event: event.try_clone().unwrap(),
    };
    let mut worker = Worker::spawn("slow", epoll, slow).unwrap();
    ring(&event);
    worker.freeze();
    assert_eq!(n_begun.load(Ordering::SeqCst), 0, "a thread is born parked");
    for turn in 1..=10 {
        // One look at the thaw, one turn for the event.
        worker.thaw();
        while n_begun.load(Ordering::SeqCst) < 2 * turn {
            std::thread::yield_now();
        }
        worker.freeze();
        assert_eq!(
            n_ended.load(Ordering::SeqCst),
            2 * turn,
            "freeze returned in the middle of a turn"
        );
        ring(&event);
    }
}

#[test]
fn a_dropped_worker_has_ended() {
    let epoll = Arc::new(Epoll::new(EpollCreateFlags::empty()).unwrap());
    let n_begun = Arc::new(AtomicUsize::new(0));
    let slow = Slow {
        n_begun: Arc::clone(&n_begun),
        n_ended: Arc::default(),
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
    };
    let mut worker = Worker::spawn("slow", epoll, slow).unwrap();
    worker.thaw();
    drop(worker);
    assert_eq!(Arc::strong_count(&n_begun), 1);
}
