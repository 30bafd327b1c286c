use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use torpor_api::vmm::VmmState;

fn takes_time(effect: &Effect) -> bool {
    match effect {
        Effect::Boot
        | Effect::Restore
        | Effect::Freeze
        | Effect::Persist
        | Effect::CommitPause
        | Effect::Run
        | Effect::Capture
        | Effect::Copy
        | Effect::Evict
        | Effect::Delete => true,
        Effect::CommitRunning
        | Effect::CommitPaused
        | Effect::CommitRefused
        | Effect::CommitStopped
        | Effect::QuitExecution => false,
    }
}

/// Outcomes that the operation begun by an effect can have.
fn outcomes(effect: Effect) -> &'static [Event] {
    match effect {
        Effect::Boot => &[Event::Booted, Event::BootFailed],
        Effect::Restore => &[
            Event::Restored,
            Event::RestoreFailed,
            Event::RestoreRefused,
            Event::LostImageGone,
        ],
        Effect::Freeze => &[Event::Frozen, Event::FreezeFailed],
        Effect::Persist => &[Event::Persisted, Event::PersistFailed],
        Effect::CommitPause => &[Event::PauseCommitted, Event::PauseNotCommitted],
        Effect::Run => &[Event::Ran, Event::LostImageKept, Event::LostImageGone],
        Effect::Capture => &[Event::Captured, Event::LostImageKept, Event::LostImageGone],
        Effect::Copy => &[Event::Copied],
        Effect::Evict => &[Event::Evicted],
        Effect::Delete => &[Event::Deleted, Event::DeleteFailed],
        Effect::CommitRunning
        | Effect::CommitPaused
        | Effect::CommitRefused
        | Effect::CommitStopped
        | Effect::QuitExecution => &[],
    }
}

const REQUESTS: [Event; 6] = [
    Event::Wake,
    Event::Resume,
    Event::BootFromDisk,
    Event::Pause,
    Event::Snapshot,
    Event::Delete,
];
const ENDINGS: [Event; 4] = [
    Event::ShutDown,
    Event::Rebooted,
    Event::LostImageKept,
    Event::LostImageGone,
];

/// What a driver is: a state, at most one operation under way, and whether a VMM is held.
struct Model {
    state: State,
    operation: Option<Effect>,
    vmm: bool,
}

impl Model {
    fn new() -> Self {
        Self {
            state: State::Creating,
            operation: Some(Effect::Boot),
            vmm: false,
        }
    }

    fn apply(&mut self, event: Event) -> Result<(), Denied> {
        let (state, effects) = next(self.state, event)?;
        let finished = self
            .operation
            .is_some_and(|operation| outcomes(operation).contains(&event));
        if finished || ENDINGS.contains(&event) {
            self.operation = None;
        }
        match event {
            Event::Booted | Event::Restored => self.vmm = true,
            Event::ShutDown
            | Event::Rebooted
            | Event::LostImageKept
            | Event::LostImageGone
            | Event::Evicted
            | Event::Deleted => self.vmm = false,
            _ => {}
        }
        self.state = state;
        for effect in effects.iter().filter(|effect| takes_time(effect)) {
            if matches!(effect, Effect::Boot | Effect::Restore) {
                assert!(!self.vmm, "{event:?} starts a second VMM in {state:?}");
                assert!(
                    self.operation.is_none(),
                    "{event:?} starts {effect:?} beside {:?}",
                    self.operation
                );
            }
            self.operation = Some(*effect);
        }
        Ok(())
    }

    /// The fact behind what is shown.
    fn check(&self) {
        match self.state.status() {
            MachineStatus::Running | MachineStatus::Pausing => {
                assert!(self.vmm, "{:?} without a VMM", self.state)
            }
            MachineStatus::Stopped => assert!(!self.vmm && self.operation.is_none(), "{:?}", self.state),
            MachineStatus::Starting | MachineStatus::Waking => {
                assert!(self.operation.is_some(), "{:?} and nothing under way", self.state);
            }
            MachineStatus::Paused => assert!(
                self.state == State::Evicting
                    || (self.state == State::Copying && !self.vmm)
                    || (!self.vmm && self.operation.is_none()),
                "{:?}",
                self.state
            ),
            MachineStatus::Deleting => {}
        }
    }

    /// Let every operation succeed until nothing is under way.
    fn settle(&mut self) {
        while let Some(operation) = self.operation {
            self.apply(outcomes(operation)[0]).unwrap();
            self.check();
        }
    }
}

fn step(model: &mut Model, choice: usize) -> bool {
    let mut possible: Vec<Event> = REQUESTS[..5].to_vec();
    possible.extend(model.operation.iter().flat_map(|operation| outcomes(*operation)));
    if model.vmm && !matches!(model.operation, Some(Effect::Evict | Effect::Delete)) {
        possible.extend(ENDINGS);
    }
    let _ = model.apply(possible[choice % possible.len()]);
    model.check();
    model.state != State::Gone
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_state_is_never_shown_without_its_fact_and_there_are_never_two_restores(
        choices in proptest::collection::vec(any::<usize>(), 1..80)
    ) {
        let mut model = Model::new();
        for choice in choices {
            if !step(&mut model, choice) { break; }
        }
    }

    #[test]
    fn a_delete_always_ends(choices in proptest::collection::vec(any::<usize>(), 0..60)) {
        let mut model = Model::new();
        for choice in choices {
            if !step(&mut model, choice) { return Ok(()); }
        }
        prop_assert!(model.apply(Event::Delete).is_ok());
        model.settle();
        prop_assert_eq!(model.state, State::Gone);
    }

    #[test]
    fn a_wake_leads_to_running_or_says_why_not(choices in proptest::collection::vec(any::<usize>(), 0..60)) {
        let mut model = Model::new();
        for choice in choices {
            if !step(&mut model, choice) { return Ok(()); }
        }
        match model.apply(Event::Wake) {
            Ok(()) => {
                model.settle();
                // A sleeper whose eviction was under way is woken right after it.
                if model.state == State::Paused {
                    model.apply(Event::Wake).unwrap();
                    model.settle();
                }
                prop_assert_eq!(model.state, State::Running);
            }
            Err(denied) => prop_assert!(matches!(denied, Denied::ImageRefused | Denied::Deleting)),
        }
    }
}

#[test]
fn at_most_one_effect_takes_time_and_it_is_the_last() {
    for (state, event) in pairs() {
        if let Ok((_, effects)) = next(state, event) {
            let slow: Vec<_> = effects.iter().filter(|effect| takes_time(effect)).collect();
            assert!(
                slow.len() <= 1 && slow.first() == effects.last().filter(|last| takes_time(last)).as_ref()
            );
        }
    }
}

#[test]
fn a_wake_while_pausing_runs_the_guest_again() {
    for state in [State::Freezing, State::Persisting, State::Durable] {
        assert_eq!(
            next(state, Event::Wake),
            Ok((State::Waking, [Effect::Run].as_slice()))
        );
    }
}

#[test]
fn every_failure_of_a_pause_runs_the_guest_again() {
    let failures = [
        (State::Freezing, Event::FreezeFailed),
        (State::Persisting, Event::PersistFailed),
        (State::Durable, Event::PauseNotCommitted),
    ];
    for (state, failure) in failures {
        assert_eq!(
            next(state, failure),
            Ok((State::Waking, [Effect::Run].as_slice()))
        );
    }
    assert_eq!(next(State::Waking, Event::Ran).unwrap().0, State::Running);
}

#[test]
fn only_an_explicit_resume_tries_a_refused_image_again() {
    assert_eq!(next(State::Refused, Event::Wake), Err(Denied::ImageRefused));
    assert_eq!(next(State::Refused, Event::Resume).unwrap().0, State::Waking);
    assert_eq!(
        next(State::Refused, Event::BootFromDisk).unwrap().0,
        State::Starting
    );
}

#[test]
fn recovery_pauses_nothing_by_accident_and_shows_nothing_that_is_not_so() {
    let vmms = [
        None,
        Some(VmmState::Blank),
        Some(VmmState::Running),
        Some(VmmState::Frozen),
        Some(VmmState::Persisting),
        Some(VmmState::Durable),
        Some(VmmState::Exited),
    ];
    for row in Committed::ALL {
        for vmm in vmms {
            for image in [Image::Fits, Image::Unusable] {
                let (state, effects) = recover(row, vmm, image);
                let case = format!("{row:?} {vmm:?} {image:?} -> {state:?} {effects:?}");
                let half = matches!(row, Committed::Creating | Committed::Deleting);
                assert_eq!(half, state == State::Deleting, "{case}");
                if matches!(
                    vmm,
                    Some(VmmState::Running | VmmState::Frozen | VmmState::Persisting)
                ) && !half
                {
                    assert!(matches!(state, State::Running | State::Waking), "{case}");
                }
                if state == State::Paused && row == Committed::Running {
                    assert_eq!(image, Image::Fits, "{case}");
                    assert!(effects.contains(&Effect::CommitPaused), "{case}");
                }
                if state.is_at_rest() && vmm.is_some() {
                    assert_eq!(effects.first(), Some(&Effect::QuitExecution), "{case}");
                }
            }
        }
    }
}

fn pairs() -> impl Iterator<Item = (State, Event)> {
    State::ALL
        .into_iter()
        .flat_map(|state| Event::ALL.into_iter().map(move |event| (state, event)))
}

fn render() -> String {
    let mut edges: BTreeMap<(usize, usize), Vec<String>> = BTreeMap::new();
    let place = |wanted: State| State::ALL.iter().position(|state| *state == wanted).unwrap();
    for (state, event) in pairs() {
        if let Ok((to, _)) = next(state, event)
            && to != state
        {
            edges
                .entry((place(state), place(to)))
                .or_default()
                .push(format!("{event:?}"));
        }
    }
    let mut text = String::from(
        "# Lifecycle of a machine\n\n\
         Rendered from the transition table in `agent/src/machine/state.rs`; a test compares this page with it\n\
         (`UPDATE_DOCS=1 cargo test -p torpor-agent the_documented_diagram` writes it anew).\n\
         `Wake`, `Resume`, `BootFromDisk`, `Pause` and `Delete` are requests; the rest are outcomes.\n\n\
         ```mermaid\nstateDiagram-v2\n    [*] --> Creating\n",
    );
    for ((from, to), events) in edges {
        let _ = writeln!(
            text,
            "    {:?} --> {:?}: {}",
            State::ALL[from],
            State::ALL[to],
            events.join(", ")
        );
    }
    text.push_str("    Gone --> [*]\n```\n\n| state | users see |\n|---|---|\n");
    for state in State::ALL {
        let _ = writeln!(
            text,
            "| {state:?} | {} |",
            serde_json::to_string(&state.status()).unwrap().trim_matches('"')
        );
    }
    text
}

#[test]
fn the_documented_diagram_equals_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/lifecycle.md");
    let rendered = render();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &rendered).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(path).unwrap(),
        rendered,
        "docs/lifecycle.md is not the table"
    );
}
