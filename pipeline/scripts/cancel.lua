#!lua flags=allow-oom
-- cancel: end a job that waits; mark one that runs and tell its worker.
-- ARGV[1] job id  ARGV[2] tenant  ARGV[3] life of a completion (ms)
-- Returns: 'cancelled' (ended here) | 'cancelling' (its worker ends it) | 'finished' (too late) | 'unknown'.
-- Invariant: the outcome is written by whoever removes the entry; the mark stands until then. A batch is marked as such,
--   and its own job, due at once, cancels the members before it closes the batch. A delivery is cancelled for good, here and
--   now, unless somebody has begun to give it to its provider: then it is too late.
local id, tenant = ARGV[1], ARGV[2]
local live = read_live(id)
if not live then
  local done = call('GET', KEY.completion .. id)
  return done and string.match(done, '"tenant":"([^"]*)"') == tenant and 'finished' or 'unknown'
end
if live.tenant ~= tenant then return 'unknown' end
local batch = live.kind == 'batch' and read_batch(id)
if batch then
  if batch.ended >= batch.wanted then return 'finished' end
  call('HSET', KEY.batch .. id, 'cancel', '1')
  call('ZADD', KEY.delayed, 'XX', digits(math.floor(clock_us() / 1000)), id)
  return 'cancelling'
end
local delivery = live.kind == 'delivery' and read_delivery(id)
if delivery and not raise_delivery(id, delivery, 'cancelled', '', clock_us()) then return 'finished' end
local word = cancel_live(id, live, ARGV[3], clock_us())
conclude()
return word
