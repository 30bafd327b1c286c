//! Images over others.

use super::*;

/// A guest whose memory is not zero up to a page, its image, and one restored from that whose images lie over it.
fn family(n_pages: u64) -> (Guest, File, Guest) {
    let mut parent = Guest::boot();
    (0..n_pages).for_each(|page| parent.write(page, page + 1));
    let parents = image_file();
    parent.persist(&parents, 1);
    let mut child = Guest::restore(&parents, 1);
    child.share();
    (parent, parents, child)
}

#[test]
fn an_image_over_another_holds_what_differs_and_what_lies_close_between() {
    let (parent, parents, mut child) = family(600);
    child.write(100, 7);
    child.write(133, 7);
    child.write(167, 7);
    child.write(300, 301);
    child.discard(400);
    let own = image_file();
    let stats = child.persist(&own, 2);
    assert_eq!(stats.written_pages, 3, "a page was written that the base has");
    assert!(reconstruct_over(&own, Some(&parents), 2) == child.dump());
    let image = child.baseline.clone().unwrap();
    let held: Vec<_> = (0..600).filter(|page| image.holds(*page)).collect();
    let wanted: Vec<_> = (100..=133).chain([167, 400]).collect();
    for start in 0..600 {
        let end = image.same_file_end(&(start..600));
        let first_other = (start..600).find(|page| image.holds(*page) != image.holds(start));
        assert_eq!(end, first_other.unwrap_or(600), "from {start}");
    }
    assert_eq!(held, wanted, "32 pages between two are taken over, 33 are not");

    let mut woken = Guest::restore_over(&own, Some(&parents), 2);
    woken.write(166, 9);
    woken.persist(&own, 3);
    assert!(reconstruct_over(&own, Some(&parents), 3) == woken.dump());
    assert!(reconstruct(&parents, 1) == parent.dump(), "the base changed");
}

#[test]
fn an_image_whose_image_is_shared_gets_a_new_file_over_the_same_base() {
    let (_, parents, mut child) = family(600);
    child.write(100, 7);
    child.write(300, 0);
    child.discard(400);
    let childs = image_file();
    child.persist(&childs, 2);
    let mut grandchild = Guest::restore_over(&childs, Some(&parents), 2);
    grandchild.share();
    grandchild.write(500, 8);
    let own = image_file();
    let stats = grandchild.persist(&own, 3);
    assert_eq!(stats.written_pages, 2, "its own page and its parent's");
    assert!(reconstruct_over(&own, Some(&parents), 3) == grandchild.dump());
}

#[test]
fn pages_taken_over_by_a_persist_that_failed_are_the_bases_again() {
    let (_, parents, mut child) = family(600);
    child.write(100, 7);
    let own = image_file();
    child.persist(&own, 2);
    let woken = Guest::restore_over(&own, Some(&parents), 2);
    woken.write(110, 7);
    let failing = || Err(io::Error::from_raw_os_error(libc::EIO));
    assert!(woken.job(&own, 3, Box::new(failing), false).run().is_err());
    let image = woken.baseline.clone().unwrap();
    assert!(
        !image.holds(105),
        "a page that the disk may not have counts as written"
    );
    // What a lost write looks like.
    let layout = ImageLayout::new(MEM_BYTES);
    let lost = vec![0; 9 * PAGE_SIZE];
    own.write_all_at(&lost, layout.page_offset(101)).unwrap();
    let mut woken = woken;
    woken.persist(&own, 4);
    assert!(image.holds(105));
    assert!(reconstruct_over(&own, Some(&parents), 4) == woken.dump());
}

#[test]
fn an_image_is_not_opened_over_anything_but_its_base() {
    let (mut parent, parents, mut child) = family(64);
    child.write(3, 7);
    let own = image_file();
    child.persist(&own, 2);
    let open = |base: Option<&File>| {
        let base = base.map(|base| base.try_clone().unwrap());
        image::open(own.try_clone().unwrap(), base, &expected(2)).map(|_| ())
    };
    assert!(open(Some(&parents)).is_ok());
    assert!(matches!(open(None), Err(OpenError::Base { found: "missing" })));
    assert!(matches!(open(Some(&own)), Err(OpenError::Base { .. })));
    assert!(open(Some(&image_file())).is_err());
    parent.write(9, 9);
    parent.persist(&parents, 2);
    let error = open(Some(&parents)).unwrap_err();
    assert!(
        matches!(error, OpenError::Base { .. }),
        "a base that was rewritten: {error}"
    );
}

#[test]
fn a_damaged_page_or_bit_of_either_file_is_found() {
    let (_, parents, mut child) = family(64);
    child.write(3, 7);
    let own = image_file();
    child.persist(&own, 2);
    let layout = ImageLayout::new(MEM_BYTES);
    let flip = |file: &File, offset: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 8], offset).unwrap();
    };
    let read = |page: u64| {
        let parents = parents.try_clone().unwrap();
        let image = image::open(own.try_clone().unwrap(), Some(parents), &expected(2)).unwrap();
        image.file.read(page, &mut vec![0; PAGE_SIZE])
    };
    for (file, offset) in [
        (&own, layout.page_offset(3)),
        (&parents, layout.page_offset(3 + 1)),
        (&own, layout.own_bits_offset()),
    ] {
        assert!(read(3).is_ok() && read(4).is_ok());
        flip(file, offset);
        assert!(read(3).is_err() || read(4).is_err(), "damage at {offset} passed");
        flip(file, offset);
    }
}
